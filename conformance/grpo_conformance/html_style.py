"""The style sheet of a report's page, for light and dark screens and for paper."""

STYLE = """
:root{color-scheme:light dark;--bg:#f6f6f3;--card:#fff;--text:#1b1e23;--soft:#5f6570;--line:#e2e2dc;
--head:#faf9f7;--pass:#0f7a4a;--pass-bg:#e2f4ea;--fail:#b3261e;--fail-bg:#fbe6e4;--other:#7a5c0f;
--other-bg:#f8efd6;--bar:#b9c4d6;--near:#d09a28}
@media (prefers-color-scheme:dark){:root{--bg:#121418;--card:#1a1d23;--text:#e7e8eb;--soft:#9aa1ad;
--line:#2c313a;--head:#20242b;--pass:#5ad598;--pass-bg:#16352a;--fail:#ff9085;--fail-bg:#3f1f1d;
--other:#e0c56c;--other-bg:#37301a;--bar:#47536a;--near:#d7a944}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 22px 60px}
h1{font-size:25px;margin:0 0 6px;display:flex;align-items:center;gap:12px;flex-wrap:wrap}
h2{font-size:18px;margin:34px 0 8px}h3{font-size:15px;margin:20px 0 6px}
p{margin:4px 0;color:var(--soft);overflow-wrap:anywhere}
.badge{display:inline-block;border-radius:99px;padding:1px 10px;font-size:13px;font-weight:600;
white-space:nowrap}
h1 .badge{font-size:17px;padding:2px 14px}
.pass{color:var(--pass)}.fail{color:var(--fail)}.other{color:var(--other)}
.badge.pass{background:var(--pass-bg)}.badge.fail{background:var(--fail-bg)}
.badge.other{background:var(--other-bg)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px;margin:16px 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:9px 14px}
.tile span{display:block;font-size:12px;color:var(--soft)}.tile b{display:block;font-size:17px}
.tile .badge{display:inline-block;font-size:14px;margin:2px 0}
.tile.none{opacity:.6}
.split{display:flex;height:5px;border-radius:3px;overflow:hidden;margin:6px 0 5px;background:var(--line)}
.split i{display:block;height:100%}.split .pass{background:var(--pass)}.split .fail{background:var(--fail)}
.split .other{background:var(--other);opacity:.55}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%}
th{text-align:left;font-size:12px;font-weight:600;color:var(--soft);padding:7px 12px;background:var(--head)}
td{border-top:1px solid var(--line);padding:6px 12px;vertical-align:top}
td p{font-size:13px;line-height:1.4;max-width:64ch}
code{font:13px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
th.num,td.num{text-align:right}
.num{font-variant-numeric:tabular-nums;white-space:nowrap}
td.id code{white-space:nowrap;overflow-wrap:normal}
.soft{color:var(--soft)}
.share{display:inline-block;width:74px;height:8px;border-radius:4px;background:var(--line);
margin-left:10px;vertical-align:middle;overflow:hidden}
.share i{display:block;height:100%;background:var(--bar)}
.share.near i{background:var(--near)}.share.over i{background:var(--fail)}
details{margin:6px 0}summary{cursor:pointer;color:var(--soft)}
.banner{border-left:4px solid var(--other);padding:8px 14px;background:var(--card);margin:14px 0;
border-radius:0 8px 8px 0;color:var(--text)}
tr.first td{border-top:2px solid var(--line)}
@media print{body{background:#fff}.scroll,.tile{break-inside:avoid}}
"""
