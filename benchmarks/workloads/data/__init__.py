"""Data for the workloads: what packages bundle, and loaders for sets that are given as a folder. Nothing is fetched."""
