"""Each measured figure that the documents state, as a command that prints it."""
