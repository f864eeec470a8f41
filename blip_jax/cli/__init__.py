"""The command line: its words, its help, and the recipes that it names."""
