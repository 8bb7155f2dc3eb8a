"""A model on several devices: dividing it from outside, the links between the places, and those who run them."""
