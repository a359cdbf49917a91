"""Plain PyTorch: sigma schedules, step rules and sampling loops."""
