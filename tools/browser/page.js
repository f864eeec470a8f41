/* What a visitor sees: a place to drop images, and their captions. */

import { Captioner } from "./captioner.js";

const element = (id) => document.getElementById(id);
let captioner;
let last = 0; // number of the newest image

async function start() {
  say("Reading the model ...");
  try {
    captioner = await Captioner.load();
    element("file").disabled = false;
    say("Ready. Images stay in this browser.");
  } catch (error) {
    refuse(error);
  }
}

async function show(file) {
  if (!captioner) return;
  const number = ++last;
  URL.revokeObjectURL(element("image").src);
  element("image").hidden = true;
  element("captions").replaceChildren();
  element("error").textContent = "";
  if (!file) {
    refuse(new Error("There is no file in what you dropped."));
    return;
  }
  say("Looking ...");
  try {
    const begin = performance.now();
    const captions = await captioner.caption(file);
    if (number !== last) return; // another image came meanwhile
    const seconds = (performance.now() - begin) / 1000;
    element("image").src = URL.createObjectURL(file);
    element("image").hidden = false;
    element("captions").replaceChildren(...captions.map(item));
    say(`${seconds.toFixed(2)} s, in this browser.`);
  } catch (error) {
    if (number === last) refuse(error);
  }
}

function item({ text, probability }) {
  const line = document.createElement("li");
  const strong = document.createElement("strong");
  strong.textContent = text;
  line.append(strong, ` (probability ${probability.toPrecision(2)})`);
  return line;
}

function say(text) {
  element("status").textContent = text;
}

function refuse(error) {
  say("");
  element("error").textContent = error.message;
}

element("file").addEventListener("change", (event) => {
  show(event.target.files[0]);
  event.target.value = ""; // so that the same file can be chosen again
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  show(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => show(event.clipboardData.files[0]));

start();
