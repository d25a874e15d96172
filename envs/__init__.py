"""What is decided: gymnasium environments. Importing this registers their ids."""
