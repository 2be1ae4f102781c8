"""The diffusion of lesion masks: noise schedule, samplers, noise coordinates."""
