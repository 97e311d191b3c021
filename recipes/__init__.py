"""Recipes: complete training runs by one command. `sparselearn recipes` lists them."""
