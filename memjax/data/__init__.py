"""What the package brings along: a public-domain text and a code file, and the sensitivities of the default model."""
