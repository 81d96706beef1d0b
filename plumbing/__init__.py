"""Nothing here is about RLHF, and no equation names it: flags, files, logs, the screen."""
