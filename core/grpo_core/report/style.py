"""The style sheet of the report: light and dark, no font and no image from outside."""

STYLE = """
:root{color-scheme:light dark;--bg:#f7f7f5;--card:#fff;--text:#1d1f23;--soft:#676c75;--line:#e4e4e0;
--c0:#2f62d9;--c1:#d9730d;--c2:#0f8f6f;--c3:#b1379b;--c4:#7a5af0;--c5:#8a6d1d;
--p0:#4c78d0;--p1:#d3a33c;--p2:#59a89c;--p3:#d1705a;--p4:#9a7fc7;--p5:#b5b8bd;--up:#13804f;--down:#c0392b}
@media (prefers-color-scheme:dark){:root{--bg:#131519;--card:#1b1e24;--text:#e6e7ea;--soft:#989ea9;
--line:#2d323b;--c0:#7aa2ff;--c1:#ffb05c;--c2:#4fd1ab;--c3:#f08bdc;--c4:#b19dff;--c5:#d8bf63;
--p0:#6d95e6;--p1:#d9b45b;--p2:#6dbfb2;--p3:#e08a75;--p4:#b29be0;--p5:#5b616b;--up:#58cf95;--down:#ff8a7d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 22px 60px}
h1{font-size:24px;margin:0 0 14px;overflow-wrap:anywhere}
h2{font-size:18px;margin:34px 0 10px}
.runs{display:grid;gap:14px}
.card,.chart,details{background:var(--card);border:1px solid var(--line);border-radius:10px}
.card{padding:14px 18px}
.card p{margin:0 0 10px;color:var(--soft);overflow-wrap:anywhere}.card p b{color:var(--text)}
.name{font-weight:600;overflow-wrap:anywhere}
.name i,.key i{display:inline-block;width:14px;height:4px;border-radius:2px;margin-right:7px;
vertical-align:middle;background:var(--c,var(--soft))}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(102px,1fr));gap:12px 16px}
.tile span,.tile em{display:block;font-size:12px;color:var(--soft);font-style:normal}
.tile b{font-size:20px;font-variant-numeric:tabular-nums;line-height:1.25}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(370px,100%),1fr));gap:14px;margin-top:14px}
.chart{margin:0;padding:12px 14px 8px;display:flex;flex-direction:column}
.chart figcaption{margin-bottom:4px}
.chart figcaption b{font-size:14px;display:block;overflow-wrap:anywhere}
.chart figcaption span{font-size:12px;color:var(--soft)}
.chart svg{width:100%;height:auto;margin-top:auto}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12px;color:var(--soft);margin-bottom:2px}
.key{white-space:nowrap}
.key.dash i{background:repeating-linear-gradient(90deg,var(--c,var(--soft)) 0 4px,transparent 4px 7px)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.p0{--c:var(--p0)}.p1{--c:var(--p1)}.p2{--c:var(--p2)}.p3{--c:var(--p3)}.p4{--c:var(--p4)}.p5{--c:var(--p5)}
.legend .p0 i,.legend .p1 i,.legend .p2 i,.legend .p3 i,.legend .p4 i,.legend .p5 i{width:10px;height:10px}
.grid{stroke:var(--line);stroke-width:1}
.tick{fill:var(--soft);font-size:11px;font-variant-numeric:tabular-nums}
.curve{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.curve.dashed{stroke-dasharray:4 4;stroke-width:1.4}
.curve.under{stroke-width:6;opacity:.38}
.soft{--c:var(--soft)}
@media (min-width:1200px){.verdicts{grid-column:span 2}}
.verdicts{justify-content:center;gap:14px}
.verdict{margin:0;padding-left:12px;border-left:3px solid var(--line);overflow-wrap:anywhere}
.verdict .name{display:block}
.verdict.good{border-color:var(--up)}.verdict.bad{border-color:var(--down)}
.card.scroll{margin-top:14px;padding:6px 18px 10px}
.compared td,.compared th{padding-right:18px}
.compared tbody tr:first-child td{border-top:1px solid var(--line)}
.dot{fill:var(--c)}.dot.far{fill:transparent}.dot:hover{fill:var(--c)}
.band{fill:var(--c);opacity:.14}
.bar{fill:var(--c)}
details{margin:10px 0;padding:0}
summary{cursor:pointer;padding:10px 16px;font-weight:600}
summary .name{font-weight:400;margin-left:10px}
details p{padding:0 16px 8px;margin:0;color:var(--soft)}
.scroll{overflow-x:auto;padding:0 16px 12px}
table{border-collapse:collapse;width:100%}
th{text-align:left;font-size:12px;font-weight:500;color:var(--soft);padding:4px 10px 4px 0}
td{border-top:1px solid var(--line);padding:8px 14px 8px 0;vertical-align:top}
td em{display:block;font-style:normal;font-size:12px;color:var(--soft)}
.num{font-variant-numeric:tabular-nums;white-space:nowrap}.up{color:var(--up)}.down{color:var(--down)}
pre{margin:0;font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere;max-height:260px;overflow-y:auto;unicode-bidi:isolate}
.samples td:nth-child(3),.samples td:nth-child(4){min-width:240px;width:40%}
.samples td:nth-child(5){min-width:70px}
pre.config{max-height:none;padding:0 16px 14px}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.none{color:var(--soft)}
@media print{.chart,details,.card{break-inside:avoid}}
"""
