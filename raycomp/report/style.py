"""The report's style sheet: light and dark by the reader's setting, from a phone's width up; no network."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1d232b; --soft: #5b6470; --line: #e2e4e7; --faint: #eef0f2;
  --accent: #1f6a8c; --accent-soft: #d5e6ee; --good: #2c7a4b; --bad: #b23a2e; --warn-back: #fdf3dc;
  --warn-ink: #6b4e0a; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14181d; --card: #1b2027; --ink: #e4e8ec; --soft: #9aa4b0; --line: #2f3741; --faint: #242b33;
  --accent: #6bb8db; --accent-soft: #23404f; --good: #6fca92; --bad: #f0877b; --warn-back: #3a3017;
  --warn-ink: #f0d999; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .6rem; }
p { margin: .5rem 0; max-width: 44rem; }
.soft { color: var(--soft); }
.lead { font-size: 1.1rem; margin-top: 1rem; }
.small { font-size: .875rem; }
code, pre { font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  white-space: pre-wrap; margin: .5rem 0; }
code { overflow-wrap: anywhere; }
.heads { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; padding: 0; }
.heads div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem; }
.heads dt { color: var(--soft); font-size: .85rem; }
.heads dd { margin: 0; }
.heads dd b { display: block; font-size: 1.6rem; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; }
thead th { color: var(--soft); font-size: .85rem; vertical-align: bottom; }
tr > :first-child { padding-left: 0; }
tr > :last-child { padding-right: 0; }
.result th:not(:first-child), .result td, .num { text-align: right; white-space: nowrap; }
.result thead th:not(:first-child) { white-space: normal; }
.result tbody th { font-weight: 400; }
.result small { display: block; color: var(--soft); }
.result small.worse { color: var(--bad); }
.result td:last-child { font-weight: 600; }
.result td:last-child small { font-weight: 400; }
.badge { display: inline-block; padding: .05rem .55rem; border-radius: 99px; font-size: .85rem; font-weight: 600;
  border: 1px solid currentColor; }
.good { color: var(--good); } .bad { color: var(--bad); }
.warnings { background: var(--warn-back); color: var(--warn-ink); border-radius: 8px; padding: .6rem 1rem;
  margin: 1.25rem 0 0; }
.warnings ul { margin: .25rem 0; padding-left: 1.2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1.25rem; }
figure { margin: 0; } figcaption { font-size: .9rem; font-weight: 600; }
.chart { width: 100%; max-width: 34rem; height: auto; display: block; }
.chart text { font: 12.5px system-ui, sans-serif; fill: var(--soft); }
.chart text.mark { font-size: 11.5px; }
.grid { stroke: var(--faint); } .axis { stroke: var(--line); }
line.mark { stroke: var(--soft); stroke-dasharray: 2 3; }
.curve, .front { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; }
.front { stroke-dasharray: 5 4; stroke-width: 1.2; }
.end, .on-front { fill: var(--accent); } .dominated { fill: var(--card); stroke: var(--soft); stroke-width: 1.4; }
.bar { display: block; width: 100%; min-width: 4rem; height: .8rem; margin-top: .35rem; border-radius: 3px;
  overflow: hidden; }
.bar .all { fill: var(--accent-soft); } .bar .kept { fill: var(--accent); }
.layers td:nth-child(2) { width: 34%; }
.times td:nth-child(2) { width: 60%; }
.name { overflow-wrap: anywhere; min-width: 6rem; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: .5rem 0; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
details summary { cursor: pointer; }
@media (max-width: 56rem) {
  .result { font-size: .82rem; } .result thead th { font-size: .78rem; }
  .result th, .result td { padding: .4rem .3rem; }
}
@media (max-width: 34rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  th, td { padding: .45rem .35rem; }
  .result { font-size: .76rem; } .result thead th { font-size: .74rem; }
  .result th, .result td { padding: .4rem .2rem; }
  .heads { grid-template-columns: 1fr 1fr; }
  .heads dd b { font-size: 1.35rem; } .heads .small { font-size: .78rem; } .heads div { padding: .7rem .8rem; }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: .5rem; }
  .on-desk { display: none; }
}
"""
