"""What agents tell the controller of the records of their ranks while they train: messages, and what they hold."""
