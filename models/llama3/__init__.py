"""Meta's Llama 3 family: ``model`` is the network, ``parallelize`` scales it, ``spec`` names its sizes."""
