"""Diagnosis of batch norms: evidence as plain numbers, rules on the evidence, and findings."""
