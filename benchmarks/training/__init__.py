"""Training runs on the workloads: what is run, how a run is carried out, and what is made of its records."""
