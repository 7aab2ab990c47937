class LatentFormat:
    latent_channels: int
    scale_factor: float
