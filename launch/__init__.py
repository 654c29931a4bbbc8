"""What brings ranks into being and keeps them alive; the only package that may import
everything.
"""
