"""How attention is computed: each file one `attend` with the same signature and the same contract."""
