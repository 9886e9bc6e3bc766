"""One file for each recipe; its docstring has the command and the result."""
