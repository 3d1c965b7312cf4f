"""Small baselines of the two other families of talking heads: a 2D generator and a radiance field.

They are there to be compared with (`talksplat-export compare`), not to be served: each is the simplest honest member of
its family that trains on a laptop's CPU in about ten minutes.
"""
