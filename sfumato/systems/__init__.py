"""Systems: a fold over stages, each a conditioner, a denoiser and a codec."""
