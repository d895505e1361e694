"""How a run is launched: in this process, on Ray, or as real processes of Flower's deployment runtime."""
