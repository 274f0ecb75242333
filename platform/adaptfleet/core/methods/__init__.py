"""One module a method: `attach` puts trainable parameters into a frozen base."""
