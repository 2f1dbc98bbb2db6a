"""What an encoder is worth: features of a checkpoint, what they are asked, and fine-tuning."""
