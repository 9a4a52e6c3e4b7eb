"""The kernels: each module computes the same attention under the same contract. See `reference` for the contract."""
