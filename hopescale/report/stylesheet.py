"""The page's style sheet: system fonts, one column, light and dark."""

from __future__ import annotations

STYLESHEET = """
:root { color-scheme: light dark; --page: #f6f8fb; --card: #fff; --ink: #0f172a; --muted: #52607a; --rule: #dde4ee;
  --accent: #2563eb; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1320; --card: #161e2e; --ink: #e8edf6; --muted: #a3b0c6; --rule: #2a3548; --accent: #7fa8ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 80px; }
header h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere; }
.kicker { margin: 0; color: var(--accent); font-weight: 600; font-size: .9rem; }
section { margin-top: 44px; }
h2 { font-size: 1.3rem; margin: 0 0 12px; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 24px 0 8px; }
p, li, figcaption { max-width: 78ch; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--rule);
  border-radius: 12px; padding: 10px; }
figcaption { color: var(--muted); font-size: .94rem; margin-top: 10px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin-bottom: 18px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 16px 18px;
  display: flex; flex-direction: column; }
.card strong { font-size: 2.1rem; line-height: 1.15; color: var(--accent); font-variant-numeric: tabular-nums; }
.card span { font-weight: 600; }
.card small { color: var(--muted); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 28px; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 14px; text-align: left; border-top: 1px solid var(--rule); vertical-align: top; }
thead th { border-top: 0; color: var(--muted); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; max-width: 22ch; overflow-wrap: anywhere; }
td { overflow-wrap: anywhere; }
.numeric td, .numeric thead th:not(:first-child) { text-align: right; }
.total th, .total td { font-weight: 700; border-top: 2px solid var(--muted); }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 14px 16px; overflow-x: auto;
  font: .88rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details { margin-top: 16px; } summary { cursor: pointer; color: var(--accent); font-weight: 600; }
@media print { section { break-inside: avoid; } }
"""
