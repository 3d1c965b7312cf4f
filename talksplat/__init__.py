"""Speech in, a talking head out: the runtime that serving and training stand on."""
