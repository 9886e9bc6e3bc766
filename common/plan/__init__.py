"""`--mode=plan`: what a training step costs on devices that need not be here."""
