"""What a loaded model can do: the methods of `Model`, an ability a file."""
