"""Training on diffusers, peft and accelerate."""
