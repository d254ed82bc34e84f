"""The style sheet of every page: readable wide, on a telephone and printed."""

CSS = """
:root{--ink:#1f2328;--muted:#5b626a;--line:#dcdfe3;--paper:#fff;--tint:#f6f7f8}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:17px/1.55 Charter,"Bitstream Charter","Sitka Text",Cambria,
"Liberation Serif",Georgia,serif}
main{max-width:62rem;margin:0 auto;padding:2.2rem 1.1rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .2rem}
h2{font-size:1.22rem;margin:2.6rem 0 .5rem;line-height:1.3}
h3{font-size:1.02rem;margin:1.4rem 0 .3rem}
p{margin:.45rem 0;max-width:44rem}
.sub{color:var(--muted);margin-top:0}
.top{display:grid;grid-template-columns:1.25fr 1fr;gap:1.4rem;margin:1.4rem 0 1rem}
.top section{border-top:3px solid var(--ink);padding-top:.5rem}
.top section.not{border-color:#b9bec4}
.top h2{margin-top:0}
.top p:first-of-type{font-size:1.06rem}
ul{margin:.4rem 0;padding-left:1.15rem;max-width:46rem}
li{margin:.25rem 0}
.not ul{font-size:.93rem}
figure{margin:0 0 1.2rem}
figure svg{display:block;width:100%;height:auto}
figure .narrow{display:none}
.panels{display:grid;gap:.4rem 1rem;align-items:end}
.panels.p2{grid-template-columns:1fr 1fr}
.panels.p3{grid-template-columns:repeat(3,1fr)}
.panels.p4{grid-template-columns:repeat(4,1fr)}
figcaption{font-size:.93rem;line-height:1.45;color:var(--ink);max-width:48rem;margin-top:.4rem}
.scroll{overflow-x:auto;margin:.5rem 0 .8rem;background:
linear-gradient(90deg,var(--paper) 40%,transparent) left/30px 100% no-repeat local,
linear-gradient(270deg,var(--paper) 40%,transparent) right/30px 100% no-repeat local,
linear-gradient(90deg,rgba(0,0,0,.18),transparent) left/11px 100% no-repeat scroll,
linear-gradient(270deg,rgba(0,0,0,.18),transparent) right/11px 100% no-repeat scroll}
table{border-collapse:collapse;font:13.5px/1.4 Arial,"Liberation Sans",Helvetica,sans-serif;
font-variant-numeric:tabular-nums}
th,td{padding:.28rem .45rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;white-space:normal;border-bottom:1.5px solid var(--ink);vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:0}
td.l,th.l{text-align:left}
td.note{white-space:normal;min-width:7rem;text-align:left}
td .iv{color:var(--muted);font-size:.92em}
td .below{display:block}
.dot{display:inline-block;width:.68em;height:.68em;border-radius:50%;margin-right:.4em}
.warn li b{font-family:Arial,"Liberation Sans",Helvetica,sans-serif;font-size:.82rem}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--muted)}
dl{display:grid;grid-template-columns:11rem 1fr;gap:.2rem 1rem;font-size:.95rem;margin:.5rem 0}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
sup{font-size:.72em;line-height:0}
code,pre{font:13px/1.45 "DejaVu Sans Mono",Menlo,Consolas,monospace}
pre{background:var(--tint);padding:.7rem .8rem;overflow-x:auto}
footer{margin-top:3rem;color:var(--muted);font-size:.85rem;overflow-wrap:anywhere}
@media screen and (max-width:760px){
body{font-size:16px}main{padding:1.2rem .9rem 3rem}
.top{grid-template-columns:1fr}
figure .wide{display:none}figure .narrow{display:block}
.panels.p2,.panels.p3{grid-template-columns:1fr}
.panels.p4{grid-template-columns:1fr 1fr;gap:.4rem .5rem}
figure svg{margin:0 auto}
dl{grid-template-columns:1fr;gap:0}dt{margin-top:.5rem}
th,td{padding:.28rem .4rem}td .iv{display:block}
}
@media print{
html{font-size:10pt}body{font-size:1rem;-webkit-print-color-adjust:exact;print-color-adjust:exact}main{max-width:none;padding:0}
h2{margin-top:1.6rem}h1,h2,h3{break-after:avoid}
figure,table,pre,li{break-inside:avoid}p,figcaption{orphans:3;widows:3}
p,ul,figcaption{max-width:none}
.scroll{overflow:visible;background:none}
table{font-size:7.2pt}th,td{padding:.2rem .35rem}td .iv{display:block}
pre{white-space:pre-wrap}
details{display:none}.warn details{display:block}
}
"""
