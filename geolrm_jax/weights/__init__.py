"""Weights from elsewhere: DINOv2, LPIPS and the released GeoLRM, read and written one tensor at a time."""
