"""An exactly scored text-to-image benchmark: pictures of scenes are read back and compared with captions."""
