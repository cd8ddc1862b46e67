"""The rewriting library: matcher, rewriter, graph specification and passes over FX graphs."""
