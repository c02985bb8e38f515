"""Words that planted sentences are made of: common ones, so that a small tokenizer's pieces are words."""

ADJECTIVES = (
    "amber ancient broad broken calm careful copper crooked curious distant eager early empty faded famous fierce "
    "gentle golden green hidden hollow honest humble iron jolly lively lonely marble mild modern narrow noble northern "
    "painted patient plain pleasant polished proud purple quiet quick rapid rough round royal rusty scarlet secret "
    "sharp silent silver simple small smooth solid southern spotted steady stone strange sturdy sunny swift tall tidy "
    "tiny velvet violet warm western white wide wild wise wooden yellow young"
).split()
NOUNS = (
    "anchor archive balcony barrel basket beacon bell bottle bridge broom button cabin candle canoe castle cellar "
    "chapel clock compass cottage cradle crown curtain drum engine fiddle fountain garden gate glove hammer harbor "
    "helmet kettle ladder lantern library locket market medal mill mirror needle orchard oven paddle palace parcel "
    "pavilion pillow piano pocket pottery pulley quarry quilt ribbon saddle scarf sewing shelter shovel sign spoon "
    "stable statue stove tavern teapot temple thimble ticket tower trumpet tunnel umbrella vase wagon wallet wheel "
    "whistle windmill workshop"
).split()
# No name and no town occurs in the novels that ship.
NAMES = (
    "Adele Bruno Carla Dario Edith Greta Hugo Irene Karin Lukas Marta Nils Pavel Rosa Stefan Tilda Ulrich Xenia "
    "Yannick Zoe Agnes Dennis Elsa Fritz Gloria Harald Ingrid Julius Klara Tamara Kenji Mateo Priya Diego Leila Enzo"
).split()
TOWNS = (
    "Arnsdorf Bellmere Calverton Dunholm Eastwick Farleigh Glenross Hartwell Ivybridge Kingsford Lindale Marlow "
    "Norbury Oakham Penrith Quarndon Redcliff Stanmore Thornbury Upwell Ventnor Wexcombe Yarmouth Zeal"
).split()
