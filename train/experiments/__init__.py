"""One file per experiment; its docstring holds the command, the time and the result. `catalogue` finds them."""
