"""The client side, where the data is: local training, personal state, and the Flower ClientApp."""
