"""What proves an architecture right: tiny random checkpoints as files, and the reference's own outputs."""
