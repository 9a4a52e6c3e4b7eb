"""Flash attention for NVIDIA Hopper in Pallas Mosaic GPU, with one memory warpgroup and two consumer warpgroups."""
