"""One run: command line, model with weights and hooks, data sets, what is printed and exported."""
