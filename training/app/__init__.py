"""The playground: each part is a plain function, the page in the browser a thin layer on them."""
