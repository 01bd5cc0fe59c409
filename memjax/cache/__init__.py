"""The cache: specs, pytrees, policies, ledgers, transforms."""
