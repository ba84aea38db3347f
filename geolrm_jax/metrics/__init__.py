"""What evaluation reports of images and of geometry."""
