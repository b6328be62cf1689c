"""Graph passes: capture a model, rewrite its graph, emit a module that runs it."""
