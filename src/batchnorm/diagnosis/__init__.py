"""What is wrong with batch norms: evidence as plain numbers, rules that judge it, and findings."""
