"""handtuned inside other libraries, one module each; nothing here is imported unless it is asked for."""
