"""What a trained model is worth: validation of a checkpoint, and likelihoods of given texts."""
