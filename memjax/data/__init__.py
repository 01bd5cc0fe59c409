"""Text that the package brings along: a public-domain excerpt for the demo."""
