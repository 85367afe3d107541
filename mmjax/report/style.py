"""The style sheet of the report: light and dark, narrow and wide, screen and paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16202c; --soft: #526071; --edge: #d8dee6;
  --grid: #e6eaf0; --track: #e4e8ee; --good: #10703a; --good-page: #e3f4e9; --tile: #ffffff;
  --c0: #1763b6; --c1: #bf4a08; --c2: #14793f; --c3: #7a2bc4; --c4: #b3155b;
  --c5: #0b7077; --c6: #856000; --c7: #4b5a6c; --c8: #5046c8; --c9: #9a3412;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10151c; --card: #18202a; --ink: #e8edf3; --soft: #a3b0bf; --edge: #303b48;
    --grid: #28323e; --track: #2c3743; --good: #6fdc98; --good-page: #163524; --tile: #f3f5f8;
    --c0: #74b5ff; --c1: #ff9e64; --c2: #63d391; --c3: #c8a2ff; --c4: #ff8dba;
    --c5: #55ccd3; --c6: #e3b94c; --c7: #a9b6c6; --c8: #a5a1ff; --c9: #f0a184;
  }
}
.c0 { --c: var(--c0) } .c1 { --c: var(--c1) } .c2 { --c: var(--c2) } .c3 { --c: var(--c3) }
.c4 { --c: var(--c4) } .c5 { --c: var(--c5) } .c6 { --c: var(--c6) } .c7 { --c: var(--c7) }
.c8 { --c: var(--c8) } .c9 { --c: var(--c9) }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body {
  margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
    "DejaVu Sans", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem }
h2 { font-size: 1.2rem; margin: 0 0 .75rem }
h3 { font-size: 1rem; margin: 0 }
h4 { font-size: .95rem; margin: 1rem 0 0 }
p { margin: .25rem 0 .75rem }
section {
  background: var(--card); border: 1px solid var(--edge); border-radius: .6rem;
  padding: 1rem; margin: 1rem 0;
}
.lead, .remark, .none, .late, figcaption p { color: var(--soft) }
.remark, .late, figcaption p { font-size: .85rem; margin: 0 }
.late { margin: .25rem .45rem 0 }
.scroll + .remark, .remark + .grid { margin-top: .5rem }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: 0 }
dl .whole { grid-column: 1 / -1 }
dt { color: var(--soft); font-size: .8rem }
dd { margin: 0; font-weight: 600 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem }
figure { margin: 0; min-width: 0 }
.named { display: inline-flex; align-items: baseline; gap: .4em }
.dot { flex: none; width: .7em; height: .7em; border-radius: 50%; background: var(--c) }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: 0; margin: 0 0 .25rem;
  font-size: .85rem }
.maps { grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); margin: .75rem 0 }
.map { width: 100%; height: 3rem; image-rendering: pixelated; border: 1px solid var(--edge); border-radius: .25rem }
svg { display: block }
.chart { width: 100%; height: auto; margin-top: .25rem }
.chart text { font-size: 11px; fill: var(--soft) }
.chart line { stroke: var(--grid) }
.line { fill: none; stroke: var(--c); stroke-linecap: round; stroke-linejoin: round }
.raw { stroke-width: 1; opacity: .38 }
.smooth { stroke-width: 2 }
.flat { stroke-width: 1.5; stroke: var(--soft); stroke-dasharray: 5 4; stroke-linecap: butt }
.lanes { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .3rem .75rem;
  align-items: center; margin-bottom: .25rem }
.lane { width: 100%; height: 1.3rem; background: var(--track); border-radius: 2px }
.lane path { fill: var(--c); shape-rendering: crispEdges }
.ends { display: flex; justify-content: space-between; color: var(--soft); font-size: .8rem;
  grid-column: 2 }
.scroll { overflow-x: auto; margin-top: .75rem }
.scroll:focus-visible { outline: 2px solid var(--c0) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding-bottom: .25rem }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--grid);
  vertical-align: middle; overflow-wrap: normal }
thead th { color: var(--soft); font-size: .8rem; font-weight: 600; vertical-align: bottom }
tbody th { font-weight: 500; min-width: 6.5rem }
tbody th[scope=rowgroup] { color: var(--soft); font-size: .85rem; padding-top: .7rem }
.n { text-align: right; white-space: nowrap }
.bar { position: relative; display: block; height: .8rem; min-width: 4.5rem; background: var(--track);
  border-radius: 2px }
.fill { position: absolute; inset: 0 auto 0 0; background: var(--c, var(--c0)); border-radius: 2px;
  min-width: 1px }
.tick { position: absolute; top: -.2rem; bottom: -.2rem; width: 2px; background: var(--ink) }
.tick.majority { background: none; border-left: 2px dotted var(--ink) }
.split { display: flex; gap: 2px; height: 1.4rem; margin: .4rem 0; background: var(--track);
  border-radius: .3rem; overflow: hidden }
.split .fill { position: static; flex: none; border-radius: 0; flex-shrink: 1 }
.spark { width: 60px; height: 20px; fill: none; stroke: var(--soft); stroke-width: 1.5 }
.spark circle { fill: var(--soft); stroke: none }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: .75rem;
  margin-top: .75rem }
.tile { border: 1px solid var(--edge); border-radius: .5rem; padding: .6rem .75rem }
.tile ul { list-style: none; margin: 0; padding: 0 }
.tile li { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .6rem; margin-top: .35rem }
.tile .value { font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums }
.tile .note { width: 100%; margin: 0 }
.chip { border-radius: 1em; padding: .05em .6em; background: var(--track); font-size: .85rem; white-space: nowrap }
.chip.good { background: var(--good-page); color: var(--good); font-weight: 700 }
.cards { list-style: none; padding: 0; margin: 0; display: grid; gap: .75rem }
.of-words { grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)) }
.of-tiles, .of-sounds { grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)) }
.cards > li { border: 1px solid var(--edge); border-radius: .5rem; padding: .6rem; min-width: 0 }
.gallery + .gallery { margin-top: 1.5rem; border-top: 1px solid var(--edge); padding-top: 1rem }
.gallery img { display: block; width: 100%; max-width: 64px; height: auto; background: var(--tile);
  border-radius: .3rem; padding: 2px }
.gallery .query { font-weight: 600; margin-bottom: .4rem; display: flex; flex-wrap: wrap; gap: .3rem .6rem;
  align-items: center }
.gallery .query picture img, .gallery .query > img { max-width: 80px; min-width: 64px }
.gallery .query > .strip { flex: 1 1 5rem; max-width: 10rem; padding: 0; border-radius: 0; background: none }
.sound { display: flex; align-items: center; gap: .4rem; min-width: 0 }
.gallery audio { display: block; height: 2.2rem; width: 100% }
.found .player { flex: none; width: 2.9rem; overflow: hidden; border-radius: 1.1rem }
.found .player audio { width: 8rem }
.query .sound { width: 100%; display: block }
.query .player { display: block; margin-bottom: .25rem }
.cards + .scroll, .gallery + .remark { margin-top: 1rem }
.gallery .spectrum { max-width: 7rem; height: 2rem; padding: 0; border-radius: .2rem }
.gallery .query .spectrum { max-width: none; height: 3.2rem; min-width: 0; margin-bottom: .3rem }
.query > .words { width: 100% }
.found { margin: 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .1rem .3rem }
.found li { border: 2px solid transparent; border-radius: .4rem; padding: 0 .3rem; min-width: 0;
  max-width: 100%; font-size: .9rem; line-height: 1.4 }
.of-words .found li, .of-sounds .found li { width: 100% }
.of-sounds .found li { display: grid; grid-template-columns: max-content minmax(0, 1fr) max-content;
  align-items: center; padding: .1rem .3rem }
.of-sounds .found .sound { width: 9rem }
.of-tiles .found li { width: calc(20% - .25rem); max-width: 76px; padding: 1px }
.guesses li { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: 0 .4rem }
.guesses .share { color: var(--soft); font-size: .85rem; margin-left: auto; font-variant-numeric: tabular-nums }
.guesses .bar { width: 100%; height: .25rem; margin-bottom: .2rem }
.guesses .right .fill { background: var(--good) }
.note { color: var(--soft); font-size: .85rem; margin-left: .4rem }
.found li.right .note { color: var(--ink) }
.found li.right { border-color: var(--good); background: var(--good-page) }
.pictures th { min-width: 0; width: 6rem }
.pictures td { padding: .15rem }
.pictures img { max-width: 96px; min-width: 56px; image-rendering: pixelated }
.mark { color: var(--good); font-size: .8rem; font-weight: 700; margin-left: .4rem;
  white-space: nowrap }
.mark::before { content: "\\2713  " }
.of-tiles .mark { margin: 0; display: block; text-align: center; font-size: .9rem; line-height: 1.1 }
.of-tiles .mark span { position: absolute; clip-path: inset(50%); width: 1px; height: 1px;
  overflow: hidden }
details { margin-top: .75rem }
summary { cursor: pointer; font-weight: 600 }
details > .grid, details > .scroll, details > p:first-of-type { margin-top: .5rem }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.4; margin: .5rem 0 0 }
footer { color: var(--soft); font-size: .85rem }
@media (max-width: 40rem) {
  body { padding: 1rem .6rem 2rem }
  section { padding: .8rem .7rem }
  .lanes { grid-template-columns: minmax(0, 1fr) }
  .ends { grid-column: 1 }
  table { font-size: .9rem }
  .bar { min-width: 3rem }
  .of-words > li { display: grid; grid-template-columns: minmax(0, 6rem) minmax(0, 1fr); column-gap: .5rem;
    align-items: start }
  .of-words > li:has(.sound) { display: block }
  .cards .late { grid-column: 1 / -1 }
}
@media print {
  body { background: none }
  section { break-inside: auto; border: 0; padding: 0 }
  figure, .cards > li, tr { break-inside: avoid }
}
"""
