"""What the busiest rank costs on a real device: sampled steps, measured experts, and the model beside them."""
