"""The networks: plain modules `net(x, t, cond)` that know nothing of diffusion mathematics."""
