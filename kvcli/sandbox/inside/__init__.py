"""What runs inside the sandbox. Only the standard library is there: nothing here imports the rest of kvcli."""
