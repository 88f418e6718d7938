"""A trained network that answers while one moves a knob: `panel serve apps/sliders.py --address 127.0.0.1`,
then /sliders?network=deblur&theme=dark."""

from workbench.sliders.served import serve_page

serve_page()
